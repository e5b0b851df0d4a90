"""How good a model is on samples that it was not trained on."""
