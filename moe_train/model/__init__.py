"""The transformer: attention, router, experts and what joins them. It knows no trainer and no cost."""
