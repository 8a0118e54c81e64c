"""From encodings to losses, and from prompts to videos: noise, timesteps and the target of the prediction."""
