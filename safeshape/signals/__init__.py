"""Signals: where is it risky? Guards, probes and judges, and the way from their spans to tokens."""
