"""What a model needs before it runs, and what a device gives: parameters, FLOPs, memory, time, money."""
