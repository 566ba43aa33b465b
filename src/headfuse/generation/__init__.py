"""Writing text fast: a cache made once, a step recorded once and replayed, tokens chosen on the device."""
