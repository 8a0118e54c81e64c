"""The engine that trains: the only room that knows DeepSpeed, but for the start of the processes."""
