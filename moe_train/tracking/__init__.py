"""Where a number goes (`tracker`: metrics.jsonl and wandb) and what a person sees of it (`console`)."""
