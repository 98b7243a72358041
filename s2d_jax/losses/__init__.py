"""Per-token losses: pure functions of arrays, unreduced, in float32."""
