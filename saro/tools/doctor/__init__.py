"""`saro doctor`: the checks of the tests, run on the user's own machine and model."""
