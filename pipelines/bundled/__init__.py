"""The small model that ships with the package: its weights, its pictures and how it was trained (`MODEL_CARD.md`)."""
