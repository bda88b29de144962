from subspan.cli.main import main

raise SystemExit(main())
