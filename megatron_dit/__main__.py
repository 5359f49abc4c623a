from megatron_dit.cli import main

main()
