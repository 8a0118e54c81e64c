"""From prompts and images to videos and their files; used by validation and by the command."""
