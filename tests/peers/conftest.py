"""The tests of this folder compare with installed peers: all of the extra `peers`, or none of these tests is collected."""

from peers.installed import MISSING

collect_ignore_glob = ["test_*.py"] if MISSING else []
