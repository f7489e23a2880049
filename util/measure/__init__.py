"""What a trained model is worth: accuracy, neighbours, maps, pictures."""
