// Formulas of pymdownx.arithmatex.
document.addEventListener("DOMContentLoaded", () => {
  for (const element of document.querySelectorAll(".arithmatex"))
    renderMathInElement(element, { delimiters: [{ left: "\\(", right: "\\)" }, { left: "\\[", right: "\\]", display: true }] });
});
