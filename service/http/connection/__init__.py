"""One HTTP connection: framing, deadlines, flow control, memory."""
