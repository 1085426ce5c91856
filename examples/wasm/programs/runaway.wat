;; Recursion without an end: a trap when the engine's limit is reached.
(module
  (func $runaway (export "runaway") (param $n i32) (result i32)
    (i32.sub
      (call $runaway (i32.add (local.get $n) (i32.const 1)))
      (local.get $n))))
