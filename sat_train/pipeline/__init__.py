"""Text encoder, video autoencoder, transformer and diffusion together: losses, and videos."""
