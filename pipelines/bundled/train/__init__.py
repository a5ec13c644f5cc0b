"""Training of the bundled model, in stages that can be stopped and resumed."""
