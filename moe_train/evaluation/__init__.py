"""What a finished run is worth: its loss on any text, and the tasks of lm-evaluation-harness."""
