"""The peers' algorithms, ported to compare with: pure policies like ours."""
