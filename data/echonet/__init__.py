"""`python -m data.echonet`: EchoNet-Dynamic as a data set."""
