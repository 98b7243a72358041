"""Where problems come from: sources of them, and which ones each step draws."""
