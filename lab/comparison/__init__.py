"""Methods of pretraining under one protocol."""
