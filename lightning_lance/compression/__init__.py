"""One training run with compressed activations, without any framework: options, surgery, session, report."""
