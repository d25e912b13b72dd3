import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # odd_networks.py, shared by the tests beside it
