"""Pictures in, tensors out: photo folders (`photos`), their captions (`captions`) and the drawn example (`subject`)."""
