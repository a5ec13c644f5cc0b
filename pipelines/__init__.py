"""Generation: from a `Job` to encoded pixels, on one rank or many. No ray, no HTTP."""
