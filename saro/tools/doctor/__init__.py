"""`saro doctor`: what the tests prove elsewhere, proved again on the user's own machine and model."""
