"""The ranks: who started them, how they meet and talk (the only room with collectives), and who is lost."""
