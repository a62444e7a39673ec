"""What a checkpoint is: its configuration, its table of weights, and how it is read and written."""
