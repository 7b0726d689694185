"""What a run costs, on paper: bytes and floating-point operations as pure functions of model, layout and batch."""
