"""What a rank holds: the model, its precision, where its weights rest, and what it has encoded before."""
