"""Shows where a MoxE model sends each token of a text: page, image and terminal."""
