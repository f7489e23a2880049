"""How fast this machine trains, and where the time goes."""
