"""Per-token losses: pure functions of arrays, unreduced, float32 at the door."""
