"""What each of M-MAE's terms and settings does."""
