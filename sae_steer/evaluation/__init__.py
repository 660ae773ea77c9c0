"""How well a suppression works, and what it costs: every method measured on the same texts, at matched removal too."""
