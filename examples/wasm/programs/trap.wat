;; Traps by `unreachable` under `depth` calls.
(module
  (func $trap (export "trap") (param $depth i32) (result i32)
    (if (i32.eqz (local.get $depth))
      (then (unreachable)))
    (i32.add
      (call $trap (i32.sub (local.get $depth) (i32.const 1)))
      (i32.const 1))))
