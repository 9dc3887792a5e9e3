// The archive comes as a data address; it is saved as soon as it is there.
watch("value", () => {
  if (!props.value) return;
  const anchor = document.createElement("a");
  anchor.href = props.value;
  anchor.download = "softcfg.zip";
  anchor.click();
});
