"""What a configuration needs before it runs: memory, time, data rate, storage. Nothing is allocated or downloaded for it."""
