"""The attack laboratory: what happens to a federation if some of its clients are malicious?"""
