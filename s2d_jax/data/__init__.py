"""Problems: where they come from, which ones a step draws, and which labels a budget buys."""
