"""Rows times the MXFP4 experts they are routed to."""
