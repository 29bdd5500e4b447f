"""The one place that decides how a matrix product is done."""
