"""What measures the product and is not the product; imports everything, is imported by nothing."""
