"""Text encoder, video autoencoder, transformer and diffusion together: losses from batches, videos from prompts."""
