from flowtrain.cli.main import main

main()
