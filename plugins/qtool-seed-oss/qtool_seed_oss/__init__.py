"""A family of models for qtool, as data: Seed-OSS."""
