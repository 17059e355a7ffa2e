"""The guardian: a small process that starts commands, and outlives its program for as long as it takes to end them."""
