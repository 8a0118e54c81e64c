"""Networks: the diffusion transformer, the video autoencoder, the text encoder, adapters."""

# before any `sat.*` import of the modules below
import sat_train.distributed.sat_packages  # noqa: F401
