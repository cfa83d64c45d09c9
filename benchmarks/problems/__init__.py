"""Objectives that the suites share."""
