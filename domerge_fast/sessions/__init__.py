"""Merges that go on: one adapter after another."""
