"""Files of weights: read them, know whose names they have, write them for other programs."""
